"""One module a command, loaded by `seqpar.cli` when it is called."""
