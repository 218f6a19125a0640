"""What the embedded pair is asked: questions it was never asked before, and how answers count."""
