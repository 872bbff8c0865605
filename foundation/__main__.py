"""`python -m foundation`: the same command line as `foundation`, for torchrun and accelerate launch."""

from foundation.cli import main

if __name__ == "__main__":
    main()
