"""What every room may use: errors, files, locks, randomness, formatting, the terminal."""
