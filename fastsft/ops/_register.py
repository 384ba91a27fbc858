"""Registration with torch.library, so that torch.compile and fake tensors see an operator as one node."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Registered:
    """A function registered as fastsft::name, called directly where no one traces.

    The path through torch.library costs about 40 us a call from Python, as much as a small layer's whole work. It is
    taken under torch.compile and under dispatch modes (fake tensors, make_fx), which need it.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Iterable[str]) -> None:
        self.function = function
        self.op = torch.library.custom_op(f"fastsft::{name}", function, mutates_args=mutates_args)
        self.register_fake = self.op.register_fake

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.op(*args)
        with torch.no_grad():
            return self.function(*args)


def register(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Registered]:
    """Make a decorator which registers a function with annotated arguments; a fake must follow (`register_fake`)."""
    return lambda function: Registered(name, function, mutates_args)
