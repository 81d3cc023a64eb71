"""One step of training, walked instant by instant: what each part of it holds on the card."""
