"""Headgate: backends behind nginx come online and go offline without losing one request."""
