"""nginx as a data plane: its files, its reloads, its control socket. One thin file each; decisions are the core's."""
