"""The rules of the protocol as pure state machines: ``(state, event) -> (state, effects)``. No I/O, no clocks."""
