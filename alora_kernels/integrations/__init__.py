"""Other people's trainers, as they are: each module needs the library that it is named after."""
