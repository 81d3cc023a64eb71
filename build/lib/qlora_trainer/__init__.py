"""What runs inside a stage: `python -m qlora_trainer prepare | train | publish`.

Each stage reads one `StageTask`, works on the job's store, and answers with its exit code and its termination
message. Nothing here imports the orchestrator beyond its contract, `orchestrator.api`.
"""
