"""qlora-orchestrator: schedules QLoRA fine-tuning jobs onto single-GPU stages sized by VRAM.

The rooms, from the inside out: `api` (the contract), `core` (pure decisions), `controller` (observe, decide,
act), `adapters` (one outside system a file), `sdk` and `cli` (how people reach it).
"""
