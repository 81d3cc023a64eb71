"""What a job makes of its adapter beside the adapter: the model in the formats that others read."""
