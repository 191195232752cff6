"""One runnable script per looped architecture that `hooks` adopts or watches."""
