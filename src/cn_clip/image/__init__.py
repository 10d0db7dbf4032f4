"""Images to pixels: decoding within limits, and the preprocessing that the weights saw."""
