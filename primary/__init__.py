"""The side that captures: freezes, pages, epochs, and the stream to every replica."""
