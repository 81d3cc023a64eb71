"""Stages on this machine: one folder and one shim a stage, placed by a local Ray that may die at any time.

`ray_stages` is the runtime that the controller uses; it stands on `stages` (folders), which stands on `shim` (one
process that sees a stage through), `agent` (the socket that trainers report to), `slots` (the GPUs of this machine)
and `processes`.
"""
