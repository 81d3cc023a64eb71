"""What documents tell people to paste: that all of it is known, that it can be run, and that it runs."""
