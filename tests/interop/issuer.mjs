// A Privacy Pass issuer (RFC 9578) with one fresh key of one token type. Keys, directory media types and issuance are
// the library's; here are HTTPS, the checks that the library leaves to its user, and the files that the gateway reads.

import { MediaType, PRIVATE_TOKEN_ISSUER_DIRECTORY, privateVerif, publicVerif, tokenEntryToSerializedLength } from '@cloudflare/privacypass-ts';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import https from 'node:https';
import path from 'node:path';
import { parseArgs } from 'node:util';

const REQUEST_PATH = '/token-request';
const REQUIRED = ['name', 'type', 'dir', 'cert', 'key'];

const ISSUERS = { [privateVerif.VOPRF.value]: voprf, [publicVerif.BLIND_RSA.value]: blindRsa };

/// Token type 1, VOPRF(P-384, SHA-384). The gateway verifies with the private scalar.
async function voprf(name) {
    const { privateKey, publicKey } = await privateVerif.keyGen();
    return {
        type: privateVerif.VOPRF,
        issuer: new privateVerif.Issuer(name, privateKey, publicKey),
        read: (octets) => privateVerif.TokenRequest.deserialize(octets),
        published: publicKey,
        file: ['type-1.keys', `${Buffer.from(privateKey).toString('hex')}\n`],
    };
}

/// Token type 2, Blind RSA (2048-bit). The gateway verifies with the public key.
async function blindRsa(name) {
    const mode = publicVerif.BlindRSAMode.PSS;
    const { privateKey, publicKey } = await publicVerif.Issuer.generateKey(mode, { modulusLength: 2048, publicExponent: Uint8Array.of(1, 0, 1) });
    // As id-RSASSA-PSS (RFC 9578 §6.5): other octets than WebCrypto exports, and these are the ones the key's id is of.
    const spki = await publicVerif.getPublicKeyBytes(publicKey);
    const lines = Buffer.from(spki).toString('base64').match(/.{1,64}/g);
    return {
        type: publicVerif.BLIND_RSA,
        issuer: new publicVerif.Issuer(mode, name, privateKey, publicKey),
        read: (octets) => publicVerif.TokenRequest.deserialize(publicVerif.BLIND_RSA, octets),
        published: spki,
        file: ['type-2.pem', ['-----BEGIN PUBLIC KEY-----', ...lines, '-----END PUBLIC KEY-----', ''].join('\n')],
    };
}

/// With padding, as the library reads it in a challenge.
function base64url(octets) {
    return Buffer.from(octets).toString('base64').replaceAll('+', '-').replaceAll('/', '_');
}

/// Issues, after the checks of RFC 9578 §5.2 and §6.2; of these the library makes only that of the token type.
async function issue({ type, issuer, read }, octets) {
    const length = tokenEntryToSerializedLength(type);
    if (octets.length !== length) throw new Error(`a token request has ${length} octets, not ${octets.length}`);
    const request = read(octets);
    if (request.truncatedTokenKeyId !== (await issuer.tokenKeyID()).at(-1)) throw new Error('truncated_token_key_id is of another key');
    return (await issuer.issue(request)).serialize();
}

async function main() {
    const { values } = parseArgs({ options: Object.fromEntries(REQUIRED.map((name) => [name, { type: 'string' }])) });
    const missing = REQUIRED.filter((name) => values[name] === undefined);
    if (missing.length > 0) throw new Error(`missing --${missing.join(', --')}`);
    if (!Object.hasOwn(ISSUERS, values.type)) throw new Error(`--type is ${Object.keys(ISSUERS).join(' or ')}, not ${values.type}`);

    const made = await ISSUERS[values.type](values.name);
    mkdirSync(values.dir, { recursive: true });
    // Type 1's is a private key.
    writeFileSync(path.join(values.dir, made.file[0]), made.file[1], { mode: 0o600 });
    const directory = JSON.stringify({
        'issuer-request-uri': REQUEST_PATH,
        'token-keys': [{ 'token-type': made.type.value, 'token-key': base64url(made.published) }],
    });

    const server = https.createServer(
        { cert: readFileSync(values.cert), key: readFileSync(values.key), minVersion: 'TLSv1.3' },
        async (request, response) => {
            const answer = (status, type, body, headers = {}) =>
                response.writeHead(status, { 'content-type': type, 'content-length': body.length, ...headers }).end(body);
            const refuse = (status, why) => {
                console.error(`issuer: ${request.method} ${request.url}: ${status}: ${why}`);
                answer(status, 'text/plain', why);
            };
            try {
                const parts = [];
                for await (const part of request) parts.push(part);
                const route = `${request.method} ${request.url}`;
                if (route === `GET ${PRIVATE_TOKEN_ISSUER_DIRECTORY}`) {
                    return answer(200, MediaType.PRIVATE_TOKEN_ISSUER_DIRECTORY, directory, { 'cache-control': 'max-age=60' });
                }
                if (route !== `POST ${REQUEST_PATH}`) return refuse(404, 'neither the directory nor a token request');
                if (request.headers['content-type'] !== MediaType.PRIVATE_TOKEN_REQUEST) {
                    return refuse(415, `not ${MediaType.PRIVATE_TOKEN_REQUEST}`);
                }
                const issued = await issue(made, new Uint8Array(Buffer.concat(parts)));
                answer(200, MediaType.PRIVATE_TOKEN_RESPONSE, issued);
                console.log('issued');
            } catch (error) {
                refuse(422, error.message);
            }
        },
    );
    server.on('error', fail);
    server.listen(0, '127.0.0.1', () => console.log(`listening 127.0.0.1:${server.address().port}`));
}

function fail(error) {
    console.error(`issuer: ${error.message}`);
    process.exit(1);
}

// A test that has read the address may close its end of the pipe; that is no reason to stop issuing.
process.stdout.on('error', () => {});
main().catch(fail);
