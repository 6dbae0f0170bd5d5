from specrt.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
