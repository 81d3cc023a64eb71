"""What the help of each command shows: lines to paste, the plainest first. Tests parse every one of them."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "init": ("qlora init notes.jsonl", "qlora init notes.csv --model Qwen/Qwen2.5-0.5B-Instruct -o notes.yaml"),
    "import openai": (
        "qlora import openai ftjob.json --model Qwen/Qwen2.5-7B-Instruct",
        "qlora import openai ftjob.json --model Qwen/Qwen2.5-7B-Instruct --training-file notes.jsonl -o job.yaml",
        "qlora import openai - --model Qwen/Qwen2.5-7B-Instruct < ftjob.json",
    ),
    "plan": ("qlora plan job.yaml", "qlora plan job.yaml --set training.sequenceLength=8192 -o json"),
    "prepare": ("qlora prepare --show 3 job.yaml", "qlora prepare medical-es"),
    "run": (
        "qlora run job.yaml",
        "qlora run --data notes.jsonl --model Qwen/Qwen2.5-0.5B-Instruct",
        "qlora run job.yaml --replace --set training.epochs=1",
    ),
    "submit": ("qlora submit job.yaml", "qlora submit queue.yaml job.yaml -n team-a", "qlora submit - < job.yaml"),
    "get": ("qlora get", "qlora get -A -o wide", "qlora get jobs medical-es -o json", "qlora get queues"),
    "describe": ("qlora describe medical-es", "qlora describe medical-es -o yaml"),
    "logs": (
        "qlora logs medical-es",
        "qlora logs medical-es -f --tail 20",
        "qlora logs medical-es --stage train --raw",
    ),
    "wait": ("qlora wait medical-es", "qlora wait medical-es --timeout 3600"),
    "download": ("qlora download medical-es", "qlora download medical-es --into adapters/medical-es"),
    "chat": ("qlora chat medical-es", 'qlora chat medical-es --prompt "¿Qué es la disnea?"'),
    "explain": ("qlora explain medical-es",),
    "simulate": (
        "qlora simulate --gpus 48Gi=+2",
        "qlora simulate --quota research:48Gi=6",
        "qlora simulate --job job.yaml -o json",
    ),
    "calibration": ("qlora calibration", "qlora calibration -o json"),
    "cancel": ("qlora cancel medical-es", "qlora cancel one two --dry-run"),
    "suspend": ("qlora suspend medical-es",),
    "resume": ("qlora resume medical-es",),
    "promote": (
        "qlora promote medical-es",
        "qlora promote medical-es --dry-run",
        'qlora promote medical-es --force --reason "the holder answers in another language"',
    ),
    "delete": ("qlora delete medical-es", "qlora delete one two -n team-a"),
    "usage": ("qlora usage", "qlora usage --by job --month 2026-11", "qlora usage --by queue --output csv"),
    "queue create": (
        "qlora queue create research",
        "qlora queue create research --quota 24Gi=4 --quota 48Gi=1 --cohort lab --weight 2",
        "qlora queue create urgent --namespace team-a --max-priority 100",
    ),
    "queue describe": ("qlora queue describe research", "qlora queue describe research -o yaml"),
    "queue hold": ("qlora queue hold research", "qlora queue hold research --drain"),
    "queue release": ("qlora queue release research",),
    "queue delete": ("qlora queue delete research",),
    "sweep": ("qlora sweep sweep.yaml", "qlora sweep sweep.yaml --dry-run"),
    "sweeps describe": ("qlora sweeps describe rates", "qlora sweeps describe rates -o json"),
    "sweeps wait": ("qlora sweeps wait rates", "qlora sweeps wait rates --timeout 86400"),
    "sweeps cancel": ("qlora sweeps cancel rates", "qlora sweeps cancel rates --dry-run"),
    "sweeps delete": ("qlora sweeps delete rates",),
    "up": ("qlora up",),
    "down": ("qlora down", "qlora down --dry-run"),
    "ui": ("qlora ui", "qlora ui --port 5001"),
    "page": ("qlora page", "qlora page --port 5002", "qlora page --context prod -n team-a"),
    "env": ('eval "$(qlora env)"',),
    "version": ("qlora version", "qlora version -o json"),
}
