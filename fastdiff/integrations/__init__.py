"""Functions with the signatures of other codebases; `import fastdiff` imports neither them nor those codebases."""
