"""What the benchmarks share: data, networks, metrics, other packages' protocols, pictures, timing and run folders."""
