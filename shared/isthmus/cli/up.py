"""`isthmus up`: the functions of a stack file on this machine."""
