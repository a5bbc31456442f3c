# The compiled module (csrc/bind_cpu.cpp): its one caller, backends/native/cpu.py, states the types.
from typing import Any

def __getattr__(name: str) -> Any: ...
