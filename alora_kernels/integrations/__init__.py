"""Other people's trainers and judges, as they are: each module needs the library that it is named after."""
