"""What a job takes: bytes on the card and seconds a step, and the memory plan that follows. Pure, as the core is."""
