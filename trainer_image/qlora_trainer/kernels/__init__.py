"""QLoRA's decoder layer with a hand-written backward pass, and the kernels under it.

`model` asks `decoder.fuse` to take over the layers of a model; nothing else is called from outside, save `ops`, whose
cross-entropy the loss uses, and `experts`, which are put into a model while it is loaded. From top to bottom:

    decoder.py     which architectures are taken over, and how; what the layers of one micro-batch share
    layer.py       one decoder layer: forward, backward, what is kept in between
    mixture.py     one whose MLP is a mixture of experts: the router, both passes
    experts.py     the routed experts of a layer: NF4 weights, both passes; transformers' layers call it, too
    linears.py     linear layers with one input: NF4 weights, LoRA adapters, both passes
    hostmemory.py  layer inputs that wait in pinned host memory, the embedding table there
    ops.py         attention and the operations between matrix products: Triton on a GPU (`triton_*`), torch elsewhere
    cards.py       which generation a card is of
"""
