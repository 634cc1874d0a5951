"""The factors of equivalent and power-of-two scaling."""
