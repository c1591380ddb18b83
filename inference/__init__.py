"""From a prompt to text: the batch decoder, writing with a stream, the engine for many writers, quantization, CUDA graphs."""
