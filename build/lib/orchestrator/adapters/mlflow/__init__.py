"""MLflow as the controller uses it: a job's run is found or created, and gets its last status."""
