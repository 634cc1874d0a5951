from onnx import TensorProto

class LazyValues:
    def __init__(self, tensor: TensorProto) -> None: ...
