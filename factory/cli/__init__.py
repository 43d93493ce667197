"""The command line: arguments in; progress, tables and errors out."""
