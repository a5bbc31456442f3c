# The compiled module (csrc/bind_cuda.cpp, for the CPU): its one caller, backends/native/cuda.py, states the types.
from typing import Any

def __getattr__(name: str) -> Any: ...
