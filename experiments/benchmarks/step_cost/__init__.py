"""What a training step computes, moves and communicates, by formula and as XLA compiles it."""
