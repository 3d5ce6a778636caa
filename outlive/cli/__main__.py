"""`python -m outlive.cli` is `outlive`, wherever the package is importable."""

from outlive.cli import main

if __name__ == "__main__":
    main()
