"""`ablate`: train every combination of some choices, several seeds of each, and say what the choices do."""
