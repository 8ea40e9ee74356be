"""Where a conversion computes: the device that it was asked for, the processes that share it, and what fits them.

In: the name of a device. Out: a `torch.device` that is there, and what differs between devices. It belongs to the
source, which reads its tensors onto it; whatever is computed from them lies there too.
"""
