"""The pure core: the model and every decision. Standard library only, no I/O, no clock (`now` is an argument)."""
