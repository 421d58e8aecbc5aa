"""The command line. Captions go to standard output, all else to standard error; main.py has the parser and the exit codes."""
