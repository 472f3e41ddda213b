"""One thin file for each part of the world: the only rooms that touch it."""
