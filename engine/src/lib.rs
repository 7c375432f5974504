//! A small Llama, Mistral and Qwen2 engine on the kvwarp kernels.
