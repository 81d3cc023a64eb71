"""QLoRA's decoder layer with a hand-written backward pass, and the kernels under it.

From top to bottom:

    takeover.py           which architectures' layers are taken over, and what those of one micro-batch share
    layer.py              one decoder layer: forward, backward, what is kept in between
    moe_layer.py          one whose MLP is a mixture of experts: the router, both passes
    moe_experts.py        the routed experts of a layer: NF4 weights, both passes; traced layers use them, too
    lora_linears.py       linear layers with one input: NF4 weights, LoRA adapters, both passes
    packed_attention.py   attention over a packed row, for transformers and for `layer.py`
    tiled_attention.py    attention that computes its scores tile by tile: windows, softcapped scores
    state_kernels.py      which code computes layers that carry a state: packages' kernels, or torch
    host_offload.py       layer inputs that wait in pinned host memory, the embedding table there
    ops.py                attention and the operations between matrix products, by name:
    torch_ops.py            in torch, for the CPU, and the reference
    triton_ops.py           as Triton kernels, with triton_attention.py and triton_experts.py
    device_generation.py  which generation a card is of
"""
