"""What vLLM's built-in connector class needs of `torch.cuda` to run on a CPU: a fake, for these tests only.

The class records a CUDA event before each load and store. On a CPU the forward pass is over by then, so an event that does
nothing is right. vLLM loads this in all its processes as one of its general plug-ins, when this folder is on PYTHONPATH.
"""

import torch


class FakeEvent:
    """An event that has always happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def install():
    torch.cuda.current_stream = lambda device=None: None
    torch.cuda.Event = FakeEvent
