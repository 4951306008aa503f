"""The command line: one command per file; a command parses, calls one library function, prints."""
