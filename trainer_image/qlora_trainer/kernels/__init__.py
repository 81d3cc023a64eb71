"""QLoRA's decoder layer with a hand-written backward pass, and the kernels under it.

`model` asks `decoder.fuse` to take over the layers of a model; nothing else is called from outside, save `ops`, whose
cross-entropy the loss uses. From top to bottom:

    decoder.py     which architectures are taken over, and how; what the layers of one micro-batch share
    layer.py       one decoder layer: forward, backward, what is kept in between
    linears.py     linear layers with one input: NF4 weights, LoRA adapters, both passes
    hostmemory.py  layer inputs that wait in pinned host memory, the embedding table there
    ops.py         attention and the operations between matrix products: Triton on a GPU (`triton_*`), torch elsewhere
"""
