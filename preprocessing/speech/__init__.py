"""English speech: text to phonemes with times, a speech synthesizer, and sentences to speak."""
