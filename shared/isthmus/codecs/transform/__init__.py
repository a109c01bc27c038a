"""The transform codec: rate–distortion coding by Fisher-weighted KLT, DCT, quantiser and entropy coder; see `codec`."""
