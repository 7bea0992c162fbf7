"""The serving process: sessions in, frames through."""
