"""The command line and the recipes behind it; `app` holds the commands."""
