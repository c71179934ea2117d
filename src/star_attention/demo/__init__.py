"""The demo: facts planted in a real long text, asked with dense attention and with Star Attention."""
