"""The chain from a model to a proven bundle.

The room is not called ``compile``: that is the function ``tfmq_export.compile``, which a module would hide.
"""
