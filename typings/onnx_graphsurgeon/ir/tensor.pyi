from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

class LazyValues:
    @property
    def tensor(self) -> TensorProto: ...
    shape: Sequence[int]
    dtype: np.dtype[np.generic] | int
    nbytes: int
    load: Callable[[], NDArray[np.generic]]
    def __init__(self, tensor: TensorProto) -> None: ...
