//! TLS for what this program serves, with one provider of cryptography.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::failure::{Failure, Outcome};

/// The server's end of TLS with a certificate chain and its private key, both PEM files.
pub fn acceptor(certificate: &Path, key: &Path) -> Outcome<TlsAcceptor> {
    let tried = format!("read the certificate {}", certificate.display());
    let usage = |e: &dyn std::fmt::Display| Failure::usage(&tried, e);
    let chain = CertificateDer::pem_file_iter(certificate).map_err(|e| usage(&e))?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|e| usage(&e))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| Failure::usage(format!("read the key {}", key.display()), e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
    Ok(TlsAcceptor::from(Arc::new(server.map_err(|e| usage(&e))?)))
}
