"""The HTTP face: routes, JSON shapes, the one error shape. It knows the runtime and decides nothing."""
