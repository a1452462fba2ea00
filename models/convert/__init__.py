"""Other people's checkpoints: which of their tensors is which of ours, and the files they come in.

Nothing here holds a whole model: a `Tensor` is read in pieces, when the writer of the other side asks for them.
"""
